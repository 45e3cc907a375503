"""What an answer's text means: reasoning, calls of tools, and what is said."""
