"""Presets: one YAML file `<agent>.<suite>.yaml` each, holding only what differs."""
