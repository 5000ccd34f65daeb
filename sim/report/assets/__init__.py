"""The page's stylesheet, script and frame; a package, so that they are installed with the code."""
