"""Shapes of dense decoder models: from a Hugging Face ``config.json``, or known by Hub id."""
