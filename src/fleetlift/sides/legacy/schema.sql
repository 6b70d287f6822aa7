-- The legacy server's file. Times are Unix milliseconds.

CREATE TABLE IF NOT EXISTS device (
    id          TEXT PRIMARY KEY,
    key_hash    BLOB NOT NULL,              -- 16 bytes of salt, 32 of BLAKE2b
    attributes  TEXT NOT NULL DEFAULT '{}',
    firmware    TEXT NOT NULL DEFAULT '',
    session     INTEGER NOT NULL DEFAULT 0, -- grows with every sign-in
    connected   INTEGER NOT NULL DEFAULT 0,
    since_ms    INTEGER,                    -- since when connected or away; NULL: never seen
    first_seen_ms INTEGER
) WITHOUT ROWID;

-- What the owner's feed tells, in the order in which it was stored. AUTOINCREMENT: a position is never used again.
CREATE TABLE IF NOT EXISTS event (
    position  INTEGER PRIMARY KEY AUTOINCREMENT,
    kind      INTEGER NOT NULL,             -- 1 telemetry, 2 answer, 3 presence, 4 report
    device    TEXT NOT NULL,
    at_ms     INTEGER NOT NULL,
    name      TEXT NOT NULL DEFAULT '',     -- channel; command; why presence changed
    number    INTEGER NOT NULL DEFAULT 0,   -- seq; 1: connected
    ts_ms     INTEGER NOT NULL DEFAULT 0,
    status    TEXT NOT NULL DEFAULT '',
    body      BLOB NOT NULL DEFAULT ''
);

CREATE TABLE IF NOT EXISTS config (
    device    TEXT PRIMARY KEY,
    revision  INTEGER NOT NULL,
    epoch     INTEGER,                      -- of the document; NULL: it names none
    document  BLOB NOT NULL
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS report (
    device    TEXT PRIMARY KEY,
    at_ms     INTEGER NOT NULL,
    document  BLOB NOT NULL
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS command (
    device         TEXT NOT NULL,
    id             TEXT NOT NULL,
    name           TEXT NOT NULL,
    mode           TEXT NOT NULL,
    params         BLOB NOT NULL,
    expires_at_ms  INTEGER NOT NULL,
    created_at_ms  INTEGER NOT NULL,
    state          TEXT NOT NULL,           -- queued, sent, or a device's answer
    PRIMARY KEY (device, id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS command_queued ON command (created_at_ms) WHERE state = 'queued';
CREATE INDEX IF NOT EXISTS command_open ON command (expires_at_ms)
    WHERE state IN ('queued', 'sent', 'acknowledged');
