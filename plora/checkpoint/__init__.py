"""What a sweep writes to disk: its directory, exact adapter states, adapters for peft."""
