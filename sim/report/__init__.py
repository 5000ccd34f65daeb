"""What a run came to, in numbers and files: summary, table, verdict, JSON, CSV, HTML, Perfetto."""
