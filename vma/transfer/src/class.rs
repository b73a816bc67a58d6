//! How urgent bytes are.

/// How urgent bytes are; the order is the order in which they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// A guest stands still until it has them.
    Miss,
    /// Nothing runs before they are here: manifest, tables, device state, working set.
    Critical,
    /// They will be wanted some time.
    Background,
}

impl Class {
    /// All, the most urgent first.
    pub const ALL: [Class; 3] = [Class::Miss, Class::Critical, Class::Background];

    /// Its place among them, and its number on the wire.
    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    pub(crate) fn from_wire(byte: u8) -> Option<Class> {
        Class::ALL.get(usize::from(byte)).copied()
    }
}
