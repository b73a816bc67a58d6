//! Packing instances on machines, beside Ganeti's `hbal` on its own score.
