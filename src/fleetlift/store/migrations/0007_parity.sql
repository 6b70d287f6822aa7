-- Parity: how the two copies of a message compare while a device sends to both sides.

-- Since when a device has been sending to both sides without a break; NULL while it does not.
ALTER TABLE device_route ADD COLUMN both_since timestamptz;

-- What came of comparing, by channel, the last time that the device sent to both by the same rules. `spans`: the
-- numbers between the first and the last pair; what lies in them and came by one path only is missing on the other.
CREATE TABLE parity (
    device     text NOT NULL,
    channel    text NOT NULL,
    old_path   text NOT NULL,                      -- the old side's name
    spans      int8multirange NOT NULL DEFAULT '{}',
    compared   bigint NOT NULL,
    differing  bigint NOT NULL,
    ignored    bigint NOT NULL,                    -- differing only in what a rule allows
    fields     jsonb NOT NULL,                     -- tallies by field
    last_at    timestamptz NOT NULL,               -- when the newest pair was compared
    rules_at   double precision NOT NULL,          -- since when the rules it was compared by were in force
    PRIMARY KEY (device, channel, old_path)
);

-- What the old side says when it is asked twice for the same message.
CREATE TABLE parity_noise (
    old_path   text NOT NULL,
    channel    text NOT NULL,
    compared   bigint NOT NULL,
    differing  bigint NOT NULL,
    fields     jsonb NOT NULL,
    last_at    timestamptz NOT NULL,
    PRIMARY KEY (old_path, channel)
);

-- What the plans of running migrations allow to differ.
CREATE TABLE parity_rules (
    migration   text PRIMARY KEY,
    old_path    text NOT NULL,
    rules       jsonb NOT NULL,
    changed_at  timestamptz NOT NULL DEFAULT now()  -- what was compared by other rules before counts no more
);

DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'fleetlift_gates')
        AND (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        GRANT SELECT ON parity, parity_noise TO fleetlift_gates;
    END IF;
END
$$;
