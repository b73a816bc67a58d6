//! Matrices: round trips and prices between places, as they were measured.
