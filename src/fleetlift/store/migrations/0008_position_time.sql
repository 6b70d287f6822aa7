-- When the log stored the message that a reader has come to. A log that lost its end (power cut) gives the same
-- numbers again: a message of another time at that number is not the one that was read.
ALTER TABLE log_position ADD COLUMN message_at double precision;  -- Unix seconds; NULL: not known
