"""Task sources: the rule catalogue, generated repositories and real code."""
