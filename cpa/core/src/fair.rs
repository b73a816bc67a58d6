//! Equi-latency placement: the network that is fairest to groups of users who play or talk together.
