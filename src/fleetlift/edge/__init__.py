"""Where devices connect: sign-in by auth callout, presence."""
