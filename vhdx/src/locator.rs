//! The parent locator: which image this one differs from, and where it was last seen ([MS-VHDX] 2.6.2.6).
//!
//! ```text
//! 0   type GUID, pair count        20      pairs: offsets and lengths of key and value        strings, UTF-16LE
//! ```
//! | key | value |
//! |---|---|
//! | `parent_linkage` | the parent's data write id when the child was made |
//! | `parent_linkage2` | a second one that is as good, while a merge changes the parent |
//! | `relative_path`, `volume_path`, `absolute_win32_path` | where the parent is; tried in this order |
//!
//! **Invariant:** what comes out of [`Locator::parse`] is text without NUL, and pairs that nobody here knows are kept.

use std::collections::HashSet;

use uuid::{Uuid, uuid};
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{VhdxError, corrupt};
use crate::format::{LocatorHeader, LocatorPair};

/// The only kind of locator: the parent is a VHDX.
const TYPE_VHDX: Uuid = uuid!("B04AEFB7-D19E-4A81-B789-25B8E9445913");
/// Pairs that are read, the bound that Microsoft's parser has too.
const PAIRS_MAX: usize = 256;
const LINKAGE: &str = "parent_linkage";
const LINKAGE2: &str = "parent_linkage2";

/// A way to the parent, in the order in which they are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PathKind {
    /// From the child's folder.
    Relative,
    /// From a volume named by its id.
    Volume,
    /// With a drive letter or a share.
    Absolute,
}

impl PathKind {
    /// All, in the order in which they are tried.
    pub(crate) const ALL: [Self; 3] = [Self::Relative, Self::Volume, Self::Absolute];

    fn key(self) -> &'static str {
        match self {
            Self::Relative => "relative_path",
            Self::Volume => "volume_path",
            Self::Absolute => "absolute_win32_path",
        }
    }
}

/// Where a parent is, in the words of Windows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParentPaths {
    /// From the child's folder: `..\base\disk.vhdx`.
    pub relative: Option<String>,
    /// From a volume: `\\?\Volume{...}\base\disk.vhdx`.
    pub volume: Option<String>,
    /// From a drive or share: `\\?\C:\base\disk.vhdx`.
    pub absolute: Option<String>,
}

/// A parent locator. Ids that are all zero match nothing and count as absent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Locator {
    pairs: Vec<(String, String)>,
}

impl Locator {
    /// A locator for a child of the image that bears `linkage`.
    pub(crate) fn new(linkage: Uuid, paths: &ParentPaths) -> Self {
        let mut locator = Self { pairs: Vec::new() };
        locator.set_linkage(linkage);
        locator.set_paths(paths);
        locator
    }

    /// Reads the item that lies at `at` in the file.
    pub(crate) fn parse(item: &[u8], at: u64) -> Result<Self, VhdxError> {
        let bad = |found: String| corrupt("parent locator", at, found);
        let (header, _) = LocatorHeader::ref_from_prefix(item)
            .map_err(|_| bad(format!("it has {} bytes, its header alone takes 20", item.len())))?;
        let kind = Uuid::from_bytes_le(header.kind);
        if kind != TYPE_VHDX {
            return Err(VhdxError::Unsupported {
                what: format!("a parent locator of type {kind} at {at:#x}"),
                hint: "only VHDX parents are known; convert the chain with the tool that made it",
            });
        }
        let count = usize::from(header.pair_count.get());
        if count > PAIRS_MAX {
            return Err(VhdxError::Limit {
                what: "the number of pairs in the parent locator",
                found: crate::format::bytes(count),
                bound: crate::format::bytes(PAIRS_MAX),
            });
        }
        let (mut pairs, mut keys) = (Vec::new(), HashSet::new());
        for number in 0..count {
            let pair = item.get(20 + number * 12..).and_then(|rest| LocatorPair::ref_from_prefix(rest).ok());
            let (pair, _) = pair.ok_or_else(|| bad(format!("{count} pairs do not fit into it")))?;
            let key = text(item, pair.key_offset.get(), pair.key_length.get(), "key").map_err(bad)?;
            let value = text(item, pair.value_offset.get(), pair.value_length.get(), "value").map_err(bad)?;
            if !keys.insert(key.clone()) {
                return Err(bad(format!("the key {key:?} occurs twice")));
            }
            pairs.push((key, value));
        }
        let locator = Self { pairs };
        locator.check(at)?;
        Ok(locator)
    }

    fn check(&self, at: u64) -> Result<(), VhdxError> {
        let bad = |found: String| Err(corrupt("parent locator", at, found));
        if self.get(LINKAGE).is_none() {
            return bad(format!("there is no {LINKAGE}"));
        }
        for key in [LINKAGE, LINKAGE2] {
            if let Some(value) = self.get(key).filter(|value| Uuid::try_parse(value).is_err()) {
                return bad(format!("{key} is {value:?}, not a GUID"));
            }
        }
        if PathKind::ALL.iter().all(|kind| self.path(*kind).is_none()) {
            return bad("there is no path to the parent".to_owned());
        }
        Ok(())
    }

    /// The item's bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let count = u16::try_from(self.pairs.len()).expect("at most 256 pairs and five of ours");
        let header =
            LocatorHeader { kind: TYPE_VHDX.to_bytes_le(), reserved: 0.into(), pair_count: count.into() };
        let (mut table, mut strings) = (header.as_bytes().to_vec(), Vec::new());
        let start = table.len() + self.pairs.len() * 12;
        let mut put = |text: &str| {
            let units: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
            let place = u32::try_from(start + strings.len()).expect("a locator is shorter than 1 MiB");
            let len = u16::try_from(units.len()).expect("texts are shorter than 32 Ki units");
            strings.extend(units);
            (place, len)
        };
        for (key, value) in &self.pairs {
            let ((key_offset, key_length), (value_offset, value_length)) = (put(key), put(value));
            let pair = LocatorPair {
                key_offset: key_offset.into(),
                value_offset: value_offset.into(),
                key_length: key_length.into(),
                value_length: value_length.into(),
            };
            table.extend(pair.as_bytes());
        }
        [table, strings].concat()
    }

    /// Whether the image with this data write id is the parent.
    pub(crate) fn matches(&self, data_write_id: Uuid) -> bool {
        [self.linkage(), self.linkage2()].contains(&Some(data_write_id))
    }

    /// The parent's data write id when the child was made.
    pub(crate) fn linkage(&self) -> Option<Uuid> {
        self.id(LINKAGE)
    }

    /// The one that a merge announced.
    pub(crate) fn linkage2(&self) -> Option<Uuid> {
        self.id(LINKAGE2)
    }

    /// The parent bears this id now.
    pub(crate) fn set_linkage(&mut self, id: Uuid) {
        self.set(LINKAGE, Some(id.braced().to_string()));
    }

    /// The parent will bear this id too, or no other any more.
    pub(crate) fn set_linkage2(&mut self, id: Option<Uuid>) {
        self.set(LINKAGE2, id.map(|id| id.braced().to_string()));
    }

    /// One way to the parent.
    pub(crate) fn path(&self, kind: PathKind) -> Option<&str> {
        self.get(kind.key()).filter(|path| !path.is_empty())
    }

    /// All ways to the parent.
    pub(crate) fn paths(&self) -> ParentPaths {
        let path = |kind| self.path(kind).map(str::to_owned);
        ParentPaths {
            relative: path(PathKind::Relative),
            volume: path(PathKind::Volume),
            absolute: path(PathKind::Absolute),
        }
    }

    /// Replaces the ways to the parent. Those that are not known any more are dropped: a stale path is worse than none.
    pub(crate) fn set_paths(&mut self, paths: &ParentPaths) {
        let ParentPaths { relative, volume, absolute } = paths.clone();
        for (kind, path) in PathKind::ALL.into_iter().zip([relative, volume, absolute]) {
            self.set(kind.key(), path);
        }
    }

    fn id(&self, key: &str) -> Option<Uuid> {
        Uuid::try_parse(self.get(key)?).ok().filter(|id| !id.is_nil())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    fn set(&mut self, key: &str, value: Option<String>) {
        self.pairs.retain(|(name, _)| name != key || value.is_some());
        let Some(value) = value else { return };
        match self.pairs.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.pairs.push((key.to_owned(), value)),
        }
    }
}

fn text(item: &[u8], offset: u32, length: u16, what: &str) -> Result<String, String> {
    let (start, len) = (offset as usize, usize::from(length));
    if !len.is_multiple_of(2) {
        return Err(format!("a {what} of {len} bytes is no UTF-16"));
    }
    let raw = item.get(start..start.saturating_add(len)).filter(|_| start >= 20);
    let Some(raw) = raw else {
        return Err(format!("a {what} of {len} bytes at {start} lies outside of it"));
    };
    let units = raw.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let text: Result<String, _> = char::decode_utf16(units).collect();
    match text {
        Ok(text) if text.contains('\0') => Err(format!("the {what} {text:?} contains a NUL")),
        Ok(text) => Ok(text),
        Err(_) => Err(format!("a {what} at {start} has half of a surrogate pair")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_locator_survives_its_bytes_with_pairs_that_nobody_knows() {
        let paths =
            ParentPaths { relative: Some(r".\Grundplatte ä.vhdx".to_owned()), ..ParentPaths::default() };
        let mut locator = Locator::new(Uuid::from_u128(7), &paths);
        locator.set("someone_elses", Some("kept".to_owned()));
        locator.set_linkage2(Some(Uuid::from_u128(9)));
        let read = Locator::parse(&locator.encode(), 0).expect("it is lawful");
        assert_eq!(read, locator);
        assert!(read.matches(Uuid::from_u128(7)) && read.matches(Uuid::from_u128(9)));
        assert_eq!(read.get("someone_elses"), Some("kept"));
    }

    #[test]
    fn a_linkage_of_zeros_matches_nothing() {
        let paths = ParentPaths { relative: Some("p".to_owned()), ..ParentPaths::default() };
        assert!(!Locator::new(Uuid::nil(), &paths).matches(Uuid::nil()));
    }

    #[test]
    fn ids_are_written_braced_and_in_lower_case() {
        let locator = Locator::new(Uuid::from_u128(0xABC), &ParentPaths::default());
        assert_eq!(locator.get(LINKAGE), Some("{00000000-0000-0000-0000-000000000abc}"));
    }
}
