-- The role that free queries of gates run as: it reads what gates are about, and no credential, and changes nothing.
-- Only a superuser can make it safely, as the embedded server's owner is; docs/engines.md says what an administrator
-- does in a database where the owner is none.

DO $$
BEGIN
    IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        RETURN;
    END IF;
    BEGIN
        CREATE ROLE fleetlift_gates NOLOGIN;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN
        NULL;  -- roles are shared by all databases of a server
    END;
    GRANT SELECT ON tenant, device, device_route, presence, presence_event, log_position, feed_position, telemetry,
        dead_letter, ledger, receipt_window, shadow, command, command_path, metric TO fleetlift_gates;
    -- With the first a query would leave the role; with the others it would speak to the services or stop them.
    REVOKE EXECUTE ON FUNCTION pg_catalog.set_config(text, text, boolean), pg_catalog.pg_notify(text, text),
        pg_catalog.pg_terminate_backend(integer, bigint), pg_catalog.pg_cancel_backend(integer) FROM PUBLIC;
END
$$;
