//! Balance: which instances should move to which machines, in few moves (paper §6.1.2).
