"""One forward pass of one model on one parallel layout, as a graph that is run, priced and sized for memory."""
