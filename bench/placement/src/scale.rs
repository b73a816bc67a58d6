//! Scale: ten thousand networks, a hundred thousand client prefixes.
