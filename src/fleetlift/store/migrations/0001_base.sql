-- The backend's tables. Times are timestamptz; ids are text as devices and people write them.

CREATE TABLE tenant (
    id          text PRIMARY KEY,
    name        text NOT NULL DEFAULT '',
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE api_token (
    id           text PRIMARY KEY,                 -- the public half of the token
    name         text NOT NULL,
    role         text NOT NULL CHECK (role IN ('viewer', 'operator', 'admin')),
    tenant       text REFERENCES tenant,           -- NULL: every tenant
    secret_hash  bytea NOT NULL,                   -- SHA-256 of 32 random bytes: nothing to guess, fast to check
    created_at   timestamptz NOT NULL DEFAULT now(),
    revoked_at   timestamptz
);

CREATE TABLE device (
    id          text PRIMARY KEY,
    tenant      text NOT NULL REFERENCES tenant,
    dialect     text NOT NULL DEFAULT 'native',
    attributes  jsonb NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX device_tenant ON device (tenant, id);

CREATE TABLE device_credential (
    device  text NOT NULL REFERENCES device ON DELETE CASCADE,
    n       smallint NOT NULL,
    kind    text NOT NULL CHECK (kind IN ('password', 'token', 'public-key', 'x509')),
    value   text NOT NULL,                         -- a hash for secrets, the PEM for keys and certificates
    PRIMARY KEY (device, n)
);

-- Which sides a device's commands go by, and the newest epoch: the store refuses an older one.
CREATE TABLE device_route (
    device      text PRIMARY KEY,
    epoch       bigint NOT NULL,
    migration   text NOT NULL,
    telemetry   text NOT NULL,
    commands    text NOT NULL,
    link        text NOT NULL,
    updated_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE presence (
    device      text PRIMARY KEY,
    connected   boolean NOT NULL,
    since       timestamptz NOT NULL,
    reason      text NOT NULL DEFAULT '',          -- why it left
    server_id   text NOT NULL DEFAULT '',
    cid         bigint NOT NULL DEFAULT 0,
    remote      text NOT NULL DEFAULT ''
);

CREATE TABLE presence_event (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    device     text NOT NULL,
    connected  boolean NOT NULL,
    at         timestamptz NOT NULL,
    reason     text NOT NULL DEFAULT ''
);
CREATE INDEX presence_event_at ON presence_event (at, device);

-- Where each reader of the log stands: stored in the transaction that stores what it read.
CREATE TABLE log_position (
    reader          text PRIMARY KEY,
    stream_created  timestamptz NOT NULL,          -- a stream made anew starts again at 1
    seq             bigint NOT NULL,
    updated_at      timestamptz NOT NULL DEFAULT now()
);

-- Where each feed of another side stands.
CREATE TABLE feed_position (
    side        text PRIMARY KEY,
    position    text NOT NULL,
    updated_at  timestamptz NOT NULL DEFAULT now()
);

-- A message is one (device, channel, ts, msg_key): msg_key is seq, or a digest of the body (negative) without one.
CREATE TABLE telemetry (
    device       text NOT NULL,
    channel      text NOT NULL,
    ts           timestamptz NOT NULL,
    msg_key      bigint NOT NULL,
    seq          bigint,
    body         json NOT NULL,
    path         text NOT NULL,                    -- by which it first came: mqtt, http, or the old side's name
    received_at  timestamptz NOT NULL,
    PRIMARY KEY (device, channel, ts, msg_key)
) PARTITION BY RANGE (ts);
CREATE TABLE telemetry_other PARTITION OF telemetry DEFAULT;  -- clocks far from ours

CREATE TABLE dead_letter (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at  timestamptz NOT NULL,
    path         text NOT NULL,
    topic        text NOT NULL,
    device       text NOT NULL,
    reason       text NOT NULL,
    payload      bytea NOT NULL,                   -- the first 64 KiB
    payload_bytes bigint NOT NULL
);

-- The ledger: which sequence numbers of a channel came by which path, as ranges. path 'mqtt' is the new side's.
CREATE TABLE ledger (
    device    text NOT NULL,
    channel   text NOT NULL,
    path      text NOT NULL,
    ranges    int8multirange NOT NULL DEFAULT '{}',
    received  bigint NOT NULL DEFAULT 0,           -- copies that came, doubles included
    doubles   bigint NOT NULL DEFAULT 0,           -- copies of what this path had already brought
    uncounted bigint NOT NULL DEFAULT 0,           -- messages without a seq
    first_at  timestamptz NOT NULL,
    last_at   timestamptz NOT NULL,
    PRIMARY KEY (device, channel, path)
);

-- How much each device sent by each path in a window of ten seconds, and how late it came.
CREATE TABLE receipt_window (
    device        text NOT NULL,
    path          text NOT NULL,
    window_start  timestamptz NOT NULL,
    messages      integer NOT NULL,
    delay_counts  integer[] NOT NULL,              -- counts by bucket, edges in core/delays.py
    PRIMARY KEY (window_start, path, device)
);

CREATE TABLE shadow (
    device         text NOT NULL,
    name           text NOT NULL DEFAULT '',       -- '' is the classic shadow
    desired        json,
    reported       json,
    desired_meta   json,
    reported_meta  json,
    version        bigint NOT NULL,
    updated_at     timestamptz NOT NULL DEFAULT now(),
    deleted_at     timestamptz,
    PRIMARY KEY (device, name)
);

CREATE TABLE command (
    id          uuid PRIMARY KEY,                  -- UUIDv7: sorts by time
    device      text NOT NULL,
    tenant      text NOT NULL,
    name        text NOT NULL,
    params      jsonb NOT NULL,
    mode        text NOT NULL CHECK (mode IN ('execute', 'dry-run')),
    status      text NOT NULL,
    created_by  text NOT NULL,
    created_at  timestamptz NOT NULL,
    expires_at  timestamptz NOT NULL,
    ended_at    timestamptz
);
CREATE INDEX command_device ON command (device, id);
CREATE INDEX command_open ON command (expires_at) WHERE ended_at IS NULL;

-- One row a path that a command goes by: 'new' is our own MQTT, 'old' the other side of a migration.
CREATE TABLE command_path (
    command          uuid NOT NULL REFERENCES command ON DELETE CASCADE,
    path             text NOT NULL CHECK (path IN ('new', 'old')),
    device           text NOT NULL,
    mode             text NOT NULL CHECK (mode IN ('execute', 'dry-run')),
    status           text NOT NULL,
    attempts         integer NOT NULL DEFAULT 0,
    created_at       timestamptz NOT NULL,
    sent_at          timestamptz,                  -- of the first copy: latency counts from here
    resent_at        timestamptz,                  -- of the newest copy, when there was more than one
    acknowledged_at  timestamptz,
    ended_at         timestamptz,
    detail           jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (command, path)
);
CREATE INDEX command_path_open ON command_path (path, device) WHERE ended_at IS NULL;
CREATE INDEX command_path_queued ON command_path (path, created_at) WHERE status = 'queued';
CREATE INDEX command_path_device ON command_path (device, created_at);
