-- Counters that must survive the process that counts: added to in the transaction that did what is counted.
CREATE TABLE metric (
    name   text NOT NULL,
    path   text NOT NULL DEFAULT '',
    value  double precision NOT NULL DEFAULT 0,
    PRIMARY KEY (name, path)
);

CREATE INDEX dead_letter_device ON dead_letter (device, id);
