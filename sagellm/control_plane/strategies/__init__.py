"""In which order the queue is served. Each strategy is one small class, chosen by name."""
