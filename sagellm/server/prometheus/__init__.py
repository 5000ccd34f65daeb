"""What ``/metrics`` says, under vLLM's names and, for what is new, our own."""
