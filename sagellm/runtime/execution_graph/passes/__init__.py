"""What rewrites an execution graph without changing its meaning."""
