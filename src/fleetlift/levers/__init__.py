"""The means by which a device is moved: move(devices, side) and observe(devices)."""
