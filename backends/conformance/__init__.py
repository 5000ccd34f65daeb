"""What every backend must do. ``python -m backends.conformance --backend cuda`` runs it and prints a table."""
