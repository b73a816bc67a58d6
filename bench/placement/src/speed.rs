//! Speed of a replay, and that it is the same each time.
