//! Quality: what online placement costs, over what any placement must cost.
