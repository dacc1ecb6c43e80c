"""fastbert inside other libraries. Each module imports its library, so nothing here is imported unless asked for."""
