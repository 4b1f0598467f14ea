"""Tables that ship: `<device name>.json`, choices measured on such a device (see README.md)."""
