//! POSIX access control lists: the bytes of `system.posix_acl_access` and `system.posix_acl_default`, and their rules.
//!
//! ```text
//!   version 2 (u32) | entries of 8 bytes: tag (u16), permissions (u16), id (u32)      little-endian, as Linux passes them
//! ```
//!
//! | event | access list | mode |
//! |---|---|---|
//! | list set | kept, unless the mode says all of it | permission bits follow the list |
//! | chmod | owner, others and mask (without one: the group) follow the mode | as asked |
//! | created under a default list | made of it and the mode; directories inherit the default itself | restricted by it |
//!
//! **Invariant:** a list that was parsed has the entries that POSIX demands, in their order; with named ones, a mask.

/// Name of the list that decides about access.
pub(crate) const ACCESS: &[u8] = b"system.posix_acl_access";
/// Name of the list that new files in a directory begin with.
pub(crate) const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4;
const ENTRY_BYTES: usize = 8;
const PERMISSIONS: u16 = 0o7;

/// Whom an entry is about; the order is that of the entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Tag {
    Owner = 0x01,
    User = 0x02,
    Group = 0x04,
    NamedGroup = 0x08,
    Mask = 0x10,
    Other = 0x20,
}

impl Tag {
    fn read(raw: u16) -> Option<Self> {
        [Self::Owner, Self::User, Self::Group, Self::NamedGroup, Self::Mask, Self::Other]
            .into_iter()
            .find(|tag| *tag as u16 == raw)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: Tag,
    permissions: u16,
    id: u32,
}

/// A list. See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Acl(Vec<Entry>);

impl Acl {
    /// The list in `bytes`; `None` when it is none, or breaks POSIX's rules.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let (version, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let (entries, odd) = rest.as_chunks::<ENTRY_BYTES>();
        if u32::from_le_bytes(*version) != VERSION || !odd.is_empty() {
            return None;
        }
        let acl = Self(entries.iter().map(read_entry).collect::<Option<_>>()?);
        acl.is_valid().then_some(acl)
    }

    /// Whether `bytes` stand for no list at all.
    pub(crate) fn is_empty(bytes: &[u8]) -> bool {
        bytes.len() <= HEADER_BYTES
    }

    /// The bytes that [`Acl::parse`] reads.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for entry in &self.0 {
            bytes.extend_from_slice(&(entry.tag as u16).to_le_bytes());
            bytes.extend_from_slice(&entry.permissions.to_le_bytes());
            bytes.extend_from_slice(&entry.id.to_le_bytes());
        }
        bytes
    }

    fn is_valid(&self) -> bool {
        let count = |tag| self.0.iter().filter(|entry| entry.tag == tag).count();
        let ordered = self.0.windows(2).all(|pair| pair[0].tag <= pair[1].tag);
        let once = [Tag::Owner, Tag::Group, Tag::Other].into_iter().all(|tag| count(tag) == 1);
        let named = count(Tag::User) + count(Tag::NamedGroup) > 0;
        let masks = count(Tag::Mask);
        ordered && once && masks <= 1 && (!named || masks == 1)
    }

    fn permissions(&self, tag: Tag) -> Option<u32> {
        self.0.iter().find(|entry| entry.tag == tag).map(|entry| u32::from(entry.permissions))
    }

    fn class_tag(&self) -> Tag {
        if self.permissions(Tag::Mask).is_some() { Tag::Mask } else { Tag::Group }
    }

    /// The permission bits that show this list in a mode.
    pub(crate) fn mode(&self) -> u32 {
        let of = |tag| self.permissions(tag).unwrap_or(0);
        of(Tag::Owner) << 6 | of(self.class_tag()) << 3 | of(Tag::Other)
    }

    /// Whether the mode alone says all that the list says.
    pub(crate) fn is_minimal(&self) -> bool {
        self.0.len() == 3
    }

    /// Brings the list in line with a new mode.
    pub(crate) fn set_mode(&mut self, mode: u32) {
        let class = self.class_tag();
        for entry in &mut self.0 {
            if let Some(bits) = bits_of(entry.tag, class, mode) {
                entry.permissions = bits;
            }
        }
    }

    /// The access list of something created with `mode` in a directory whose default this is, and the mode that it gets.
    pub(crate) fn inherited(&self, mode: u32) -> (Self, u32) {
        let mut acl = self.clone();
        let class = acl.class_tag();
        for entry in &mut acl.0 {
            if let Some(bits) = bits_of(entry.tag, class, mode) {
                entry.permissions &= bits;
            }
        }
        let mode = mode & !0o777 | acl.mode();
        (acl, mode)
    }
}

/// The bits of `mode` that stand for an entry, if any do.
fn bits_of(tag: Tag, class: Tag, mode: u32) -> Option<u16> {
    let shift = match tag {
        Tag::Owner => 6,
        Tag::Other => 0,
        tag if tag == class => 3,
        _ => return None,
    };
    u16::try_from(mode >> shift & 0o7).ok()
}

fn read_entry(bytes: &[u8; ENTRY_BYTES]) -> Option<Entry> {
    let [t0, t1, p0, p1, i0, i1, i2, i3] = *bytes;
    let permissions = u16::from_le_bytes([p0, p1]);
    let tag = Tag::read(u16::from_le_bytes([t0, t1])).filter(|_| permissions <= PERMISSIONS)?;
    Some(Entry { tag, permissions, id: u32::from_le_bytes([i0, i1, i2, i3]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: u32 = u32::MAX;

    fn acl(entries: &[(Tag, u16, u32)]) -> Acl {
        Acl(entries.iter().map(|&(tag, permissions, id)| Entry { tag, permissions, id }).collect())
    }

    fn named() -> Acl {
        acl(&[
            (Tag::Owner, 7, NOBODY),
            (Tag::User, 6, 1000),
            (Tag::Group, 5, NOBODY),
            (Tag::Mask, 6, NOBODY),
            (Tag::Other, 1, NOBODY),
        ])
    }

    #[test]
    fn a_list_reads_back_and_what_breaks_the_rules_does_not() {
        let good = named();
        assert_eq!(Acl::parse(&good.bytes()), Some(good.clone()));
        let without = |tag| Acl(good.0.iter().copied().filter(|entry| entry.tag != tag).collect()).bytes();
        for tag in [Tag::Owner, Tag::Group, Tag::Other, Tag::Mask] {
            assert_eq!(Acl::parse(&without(tag)), None, "{tag:?} is needed");
        }
        let mut swapped = good.clone();
        swapped.0.swap(0, 1);
        assert_eq!(Acl::parse(&swapped.bytes()), None, "out of order");
        for end in 0..good.bytes().len() {
            assert_eq!(Acl::parse(&good.bytes()[..end]), None, "cut at {end}");
        }
        let mut bits = good.bytes();
        bits[6] = 8;
        assert_eq!(Acl::parse(&bits), None, "a permission that does not exist");
    }

    #[test]
    fn the_group_bits_of_a_mode_are_the_mask() {
        let mut list = named();
        assert_eq!(list.mode(), 0o761);
        list.set_mode(0o640);
        assert_eq!(list.mode(), 0o640);
        assert_eq!(list.permissions(Tag::Group), Some(5), "only the mask followed");
        let mut plain = acl(&[(Tag::Owner, 7, NOBODY), (Tag::Group, 5, NOBODY), (Tag::Other, 1, NOBODY)]);
        assert!(plain.is_minimal());
        plain.set_mode(0o604);
        assert_eq!((plain.mode(), plain.permissions(Tag::Group)), (0o604, Some(0)));
    }

    #[test]
    fn what_is_created_gets_what_both_the_default_and_the_mode_allow() {
        let (access, mode) = named().inherited(0o4644);
        assert_eq!(mode, 0o4640);
        assert_eq!(access.mode(), 0o640);
        assert_eq!(access.permissions(Tag::User), Some(6), "named entries stay; the mask limits them");
    }
}
