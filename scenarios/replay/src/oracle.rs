//! What any placement must cost at least, and what a clairvoyant one costs: every result is judged between the two.

pub use vmatrix_cpa_core::horizon::dual::{Lower, certify, first_prices, lower, rounded, upper};
