-- A tenant's move is a migration too: same controller's tables, log and report, a state of its own.

ALTER TABLE engine.migration
    ADD COLUMN kind text NOT NULL DEFAULT 'fleet' CHECK (kind IN ('fleet', 'tenant'));

-- Files that a plan names and that come with it, such as scenarios of load.
CREATE TABLE engine.plan_file (
    migration  text NOT NULL REFERENCES engine.migration ON DELETE CASCADE,
    name       text NOT NULL,
    content    text NOT NULL,
    PRIMARY KEY (migration, name)
);
