"""What is known of a model beside its weights: from a Hugging Face ``config.json``, or by Hub id."""
