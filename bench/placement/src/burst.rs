//! Bursts: how soon recorded ones are seen, and how often one is seen that is none.
