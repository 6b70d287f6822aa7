-- A device that was installed anew counts from the beginning again. `ranges` are the numbers of the newest count.
ALTER TABLE ledger
    ADD COLUMN restarts    integer NOT NULL DEFAULT 0,  -- how often the channel's count began anew
    ADD COLUMN began_at    timestamptz,                 -- receipt of the newest count's first message
    ADD COLUMN began_ts_ms bigint,                      -- and that message's own time
    ADD COLUMN earlier     bigint NOT NULL DEFAULT 0;   -- numbers of the earlier counts, by any path
