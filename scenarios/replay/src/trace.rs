//! Demand traces: requests in each of equal steps of time.
