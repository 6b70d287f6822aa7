-- The audit log becomes a chain of hashes, and every version of a plan is kept (core/chain.py says how it is made).
-- Lines written before this keep their place without number and hash: the chain of a migration under way begins with
-- its next line, and such a migration has no certificate.

ALTER TABLE engine.audit
    ADD COLUMN number integer,                         -- place in the migration's chain, from 1
    ADD COLUMN hash text,
    ALTER COLUMN evidence DROP DEFAULT,
    ALTER COLUMN evidence TYPE json USING evidence::json,  -- json keeps the text as it was hashed, jsonb does not
    ALTER COLUMN evidence SET DEFAULT '{}';
CREATE UNIQUE INDEX audit_chain ON engine.audit (migration, number);

CREATE TABLE engine.plan (
    migration  text NOT NULL REFERENCES engine.migration ON DELETE CASCADE,
    version    integer NOT NULL,
    since      timestamptz NOT NULL,
    plan       text NOT NULL,
    PRIMARY KEY (migration, version)
);
INSERT INTO engine.plan (migration, version, since, plan)
    SELECT name, plan_version, updated_at, plan FROM engine.migration;
