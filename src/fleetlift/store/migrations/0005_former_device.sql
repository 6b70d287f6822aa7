-- Whose a deleted device was: its telemetry, shadows and commands stay, so its id goes to no other tenant.

CREATE TABLE former_device (
    id          text PRIMARY KEY,
    tenant      text NOT NULL REFERENCES tenant,
    deleted_at  timestamptz NOT NULL DEFAULT now()
);
