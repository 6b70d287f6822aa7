"""Tenant data: one tenant leaves a live multi-tenant database, and may come back."""
