-- The first copy of a command to a device that is connected is for who listens now, and is stored nowhere.
-- True until a copy was stored that waits for the device.
ALTER TABLE command_path ADD COLUMN live boolean NOT NULL DEFAULT false;
