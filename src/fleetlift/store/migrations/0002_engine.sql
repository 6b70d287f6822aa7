-- The migration engine's own schema: by default in the same database, in production on another server.

CREATE SCHEMA engine;

CREATE TABLE engine.migration (
    name          text PRIMARY KEY,
    tenant        text NOT NULL,
    plan          text NOT NULL,                   -- the plan file as given
    plan_version  integer NOT NULL DEFAULT 1,
    version       bigint NOT NULL DEFAULT 0,       -- grows with each commit: of two controllers one is turned away
    phase         text NOT NULL,
    state         jsonb NOT NULL,                  -- MigrationState without its members
    gates         jsonb NOT NULL DEFAULT '[]',     -- the last verdicts
    created_by    text NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE engine.member (
    migration  text NOT NULL REFERENCES engine.migration ON DELETE CASCADE,
    device     text NOT NULL,
    rank       integer NOT NULL,
    rung       integer NOT NULL,
    epoch      bigint NOT NULL,
    state      text NOT NULL,
    reason     text NOT NULL DEFAULT '',
    wave       integer,
    told_at    timestamptz,
    moved_at   timestamptz,
    came_from  integer NOT NULL DEFAULT 0,
    PRIMARY KEY (migration, device)
);

-- Up to which seq the new side had each channel when a device was told to move: what it numbers later counts.
CREATE TABLE engine.baseline (
    migration  text NOT NULL REFERENCES engine.migration ON DELETE CASCADE,
    device     text NOT NULL,
    epoch      bigint NOT NULL,
    seqs       jsonb NOT NULL,                     -- by channel
    PRIMARY KEY (migration, device)
);

CREATE TABLE engine.audit (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    migration  text NOT NULL,
    at         timestamptz NOT NULL,
    actor      text NOT NULL,
    kind       text NOT NULL,
    text       text NOT NULL,
    evidence   jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_migration ON engine.audit (migration, id);

-- What people asked for; the controller answers each once.
CREATE TABLE engine.request (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    migration  text NOT NULL,
    kind       text NOT NULL,
    args       jsonb NOT NULL DEFAULT '{}',
    actor      text NOT NULL,
    at         timestamptz NOT NULL DEFAULT now(),
    answered_at timestamptz
);
CREATE INDEX request_open ON engine.request (migration, id) WHERE answered_at IS NULL;

-- One row a second or so: devices and rates by side, latencies, gates. The report's plots are made of it.
CREATE TABLE engine.sample (
    migration  text NOT NULL,
    at         timestamptz NOT NULL,
    data       jsonb NOT NULL,
    PRIMARY KEY (migration, at)
);
