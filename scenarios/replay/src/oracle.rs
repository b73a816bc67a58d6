//! What any placement must cost at least, and what a clairvoyant one costs: every result is judged between the two.
//!
//! ```text
//!  a whole trace as one Problem ─▶ upper: a plan that knows the future, improved; rounded: another, from the dual
//!                               └▶ lower: no plan costs less, certified
//! ```

pub use vmatrix_cpa_core::horizon::dual::{Lower, certify, first_prices, lower, rounded, upper};
