//! Pools that services share: how many machines a loss target needs.
