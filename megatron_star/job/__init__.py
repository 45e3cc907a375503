"""A job of ranks: environment, session, loading, and what its programs share."""
