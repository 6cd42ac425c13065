//! Pages as the difference to what was sent of them before: the bytes of such a record.
//!
//! ```text
//!   record:  entries, going up          place: offset in RAM of the first entry's page
//!   entry:   page u16, counted from the record's place | bytes of patches u16 | CRC-32C of the whole page u32 | patches
//!   patch:   first word u16 | words u16 | the words, 8 bytes each        going up, none over another
//! ```
//! All numbers are little-endian. **Invariant:** a page is written only when it has become what the source has, which its
//! checksum says: a target that has something else than the source remembers refuses the stream and keeps its page.

use super::record::{PAGE, RUN_BYTES_MAX, StreamError};

const WORD: usize = 8;
const WORDS: usize = PAGE / WORD;
/// What is equal is passed over in steps of this, which compare faster than words.
const STEP: usize = 256;
const _: () = assert!(PAGE.is_multiple_of(STEP) && STEP.is_multiple_of(WORD));
const PATCH_HEADER: usize = 4;
const ENTRY_HEADER: usize = 8;
/// A page of which more has changed goes whole.
const PATCHES_BYTES_MAX: usize = PAGE / 2;
const INVALID: StreamError = StreamError::Invalid("a page as a difference");

/// How a page differs from what was sent of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Difference {
    /// Not at all.
    None,
    /// By an entry of so many bytes.
    Entry(usize),
    /// Too much.
    Large,
}

/// Entries that wait to be sent as one record.
#[derive(Debug, Default)]
pub(super) struct Entries {
    first: u64,
    count: u64,
    bytes: Vec<u8>,
}

impl Entries {
    /// Whether entries for the next pages, from this one on, have room behind the others, whatever they are.
    pub(super) fn have_room(&self, page: u64, pages: usize) -> bool {
        let bytes = self.bytes.len() + pages * (ENTRY_HEADER + PATCHES_BYTES_MAX);
        let last = page + pages as u64 - 1;
        self.count == 0 || (bytes <= RUN_BYTES_MAX && last - self.first <= u64::from(u16::MAX))
    }

    /// Adds how `new` differs from `old`. Pages go up until the entries are taken.
    pub(super) fn add(&mut self, page: u64, old: &[u8], new: &[u8]) -> Difference {
        debug_assert!(self.have_room(page, 1), "asked before");
        let start = self.bytes.len();
        self.bytes.extend([0; ENTRY_HEADER]);
        let fits = patches(old, new, &mut self.bytes);
        let length = self.bytes.len() - start;
        if !fits || length == ENTRY_HEADER {
            self.bytes.truncate(start);
            return if fits { Difference::None } else { Difference::Large };
        }
        if self.count == 0 {
            self.first = page;
        }
        self.count += 1;
        let short = |number: u64| u16::try_from(number).expect("there was room for it").to_le_bytes();
        let header = &mut self.bytes[start..start + ENTRY_HEADER];
        header[..2].copy_from_slice(&short(page - self.first));
        header[2..4].copy_from_slice(&short((length - ENTRY_HEADER) as u64));
        header[4..].copy_from_slice(&crc32c::crc32c(new).to_le_bytes());
        Difference::Entry(length)
    }

    /// First page, number of pages and payload, unless there are none.
    pub(super) fn record(&self) -> Option<(u64, u64, &[u8])> {
        (self.count > 0).then_some((self.first, self.count, &self.bytes[..]))
    }

    pub(super) fn clear(&mut self) {
        self.count = 0;
        self.bytes.clear();
    }
}

/// Appends what turns `old` into `new`; `false` when that is more than a page may have.
fn patches(old: &[u8], new: &[u8], into: &mut Vec<u8>) -> bool {
    let most = into.len() + PATCHES_BYTES_MAX;
    for (step, (old, new)) in old.chunks_exact(STEP).zip(new.chunks_exact(STEP)).enumerate() {
        if old != new && !patches_of_step(step * STEP / WORD, old, new, into, most) {
            return false;
        }
    }
    true
}

fn patches_of_step(base: usize, old: &[u8], new: &[u8], into: &mut Vec<u8>, most: usize) -> bool {
    let same = |word: usize| old[word * WORD..][..WORD] == new[word * WORD..][..WORD];
    let mut at = 0;
    while at < STEP / WORD {
        if same(at) {
            at += 1;
            continue;
        }
        let first = at;
        while at < STEP / WORD && !same(at) {
            at += 1;
        }
        if into.len() + PATCH_HEADER + (at - first) * WORD > most {
            return false;
        }
        let short = |number: usize| u16::try_from(number).expect("words of a page").to_le_bytes();
        into.extend(short(base + first));
        into.extend(short(at - first));
        into.extend(&new[first * WORD..at * WORD]);
    }
    true
}

/// One entry as it came.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    /// Counted from the record's place.
    pub(super) page: u64,
    sum: u32,
    patches: &'a [u8],
}

impl Entry<'_> {
    /// Turns what the target has of the page into what the source has.
    ///
    /// # Errors
    /// When the patches break the rules or lead to something else. The content is of no use then.
    pub(super) fn apply(&self, page: &mut [u8; PAGE]) -> Result<(), StreamError> {
        let mut rest = self.patches;
        let mut free = 0;
        while !rest.is_empty() {
            let (first, words, behind) = patch_header(rest).ok_or(INVALID)?;
            let end = first + words;
            if words == 0 || first < free || end > WORDS {
                return Err(INVALID);
            }
            let (content, behind) = behind.split_at_checked(words * WORD).ok_or(INVALID)?;
            page[first * WORD..end * WORD].copy_from_slice(content);
            (free, rest) = (end, behind);
        }
        if crc32c::crc32c(&page[..]) != self.sum {
            return Err(StreamError::Invalid(
                "a difference does not lead to the page that the source has; move the VM anew",
            ));
        }
        Ok(())
    }
}

fn patch_header(bytes: &[u8]) -> Option<(usize, usize, &[u8])> {
    let (first, rest) = bytes.split_first_chunk()?;
    let (words, rest) = rest.split_first_chunk()?;
    Some((u16::from_le_bytes(*first).into(), u16::from_le_bytes(*words).into(), rest))
}

/// The entries of a record, until the first that breaks the rules.
pub(super) fn entries(mut payload: &[u8]) -> impl Iterator<Item = Result<Entry<'_>, StreamError>> {
    let mut free = 0;
    let mut broken = false;
    std::iter::from_fn(move || {
        if payload.is_empty() || broken {
            return None;
        }
        let entry = split_entry(payload).filter(|(entry, _)| entry.page >= free);
        let Some((entry, behind)) = entry else {
            broken = true;
            return Some(Err(INVALID));
        };
        (free, payload) = (entry.page + 1, behind);
        Some(Ok(entry))
    })
}

fn split_entry(bytes: &[u8]) -> Option<(Entry<'_>, &[u8])> {
    let (page, rest) = bytes.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let (sum, rest) = rest.split_first_chunk()?;
    let length: usize = u16::from_le_bytes(*length).into();
    if !(1..=PATCHES_BYTES_MAX).contains(&length) {
        return None;
    }
    let (patches, rest) = rest.split_at_checked(length)?;
    Some((Entry { page: u16::from_le_bytes(*page).into(), sum: u32::from_le_bytes(*sum), patches }, rest))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn page_of(content: Vec<u8>) -> Box<[u8; PAGE]> {
        content.try_into().expect("a page")
    }

    fn noise(seed: u64) -> Box<[u8; PAGE]> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        };
        page_of(std::iter::repeat_with(next).take(PAGE).collect())
    }

    /// Sends `new` to a target that has `old`; gives the bytes of the entry, unless it goes whole.
    fn round_trip(old: &[u8; PAGE], new: &[u8; PAGE]) -> Option<usize> {
        let mut entries_out = Entries::default();
        match entries_out.add(70, old, new) {
            Difference::None => {
                assert!(old == new, "a change was not seen");
                assert_eq!(entries_out.record(), None);
                Some(0)
            }
            Difference::Large => {
                assert_eq!(entries_out.record(), None);
                None
            }
            Difference::Entry(length) => {
                let (first, count, payload) = entries_out.record().expect("an entry");
                assert_eq!((first, count, payload.len()), (70, 1, length));
                let mut page = *old;
                let all: Vec<_> = entries(payload).map(|entry| entry.expect("a good entry")).collect();
                assert_eq!((all.len(), all[0].page), (1, 0));
                all[0].apply(&mut page).expect("the right base");
                assert!(page == *new, "another page");
                Some(length)
            }
        }
    }

    #[test]
    fn a_page_becomes_what_it_became_at_the_source_wherever_it_has_changed() {
        let old = noise(1);
        assert_eq!(round_trip(&old, &old), Some(0));
        for at in [0, 7, 8, STEP - 1, STEP, PAGE / 2 - 1, PAGE - WORD, PAGE - 1] {
            let mut new = old.clone();
            new[at] ^= 1;
            assert_eq!(round_trip(&old, &new), Some(ENTRY_HEADER + PATCH_HEADER + WORD), "byte {at}");
        }
        assert_eq!(round_trip(&old, &noise(2)), None, "all of it has changed");
        // Every other word: the headers count too. A run over steps.
        for (every, from, to, whole) in
            [(2, 0, PAGE, true), (4, 0, PAGE, false), (1, 200, 1900, false), (1, 0, PAGE / 2, true)]
        {
            let mut new = old.clone();
            (from..to).filter(|at| (at / WORD).is_multiple_of(every)).for_each(|at| new[at] ^= 0xff);
            assert_eq!(round_trip(&old, &new).is_none(), whole, "every {every} from {from} to {to}");
        }
        assert_eq!(round_trip(&page_of(vec![0; PAGE]), &noise(3)), None);
    }

    #[test]
    fn a_target_that_has_another_page_than_is_remembered_is_told_so() {
        let (old, mut new) = (noise(1), noise(1));
        new[500] ^= 1;
        let mut sent = Entries::default();
        assert!(matches!(sent.add(0, &old[..], &new[..]), Difference::Entry(_)));
        let entry = entries(sent.record().unwrap().2).next().unwrap().unwrap();
        let mut other = old.clone();
        other[4000] ^= 1;
        let refused = entry.apply(&mut other).expect_err("the base is another one");
        assert!(refused.to_string().contains("move the VM anew"), "{refused}");
    }

    #[test]
    fn pages_that_are_far_apart_or_many_go_in_further_records() {
        let (old, mut new) = (noise(1), noise(1));
        (0..PAGE / 2 - 300).for_each(|at| new[at] ^= 0xff);
        let mut sent = Entries::default();
        let mut count = 0;
        while sent.have_room(count, 1) {
            assert!(matches!(sent.add(count, &old[..], &new[..]), Difference::Entry(_)));
            count += 1;
        }
        assert!(count > 100 && sent.record().unwrap().2.len() <= RUN_BYTES_MAX);
        sent.clear();
        assert!(sent.have_room(9, RUN_BYTES_MAX / PAGE));
        assert!(matches!(sent.add(9, &old[..], &new[..]), Difference::Entry(_)));
        assert!(
            sent.have_room(9 + 65535, 1) && !sent.have_room(9 + 65535, 2) && !sent.have_room(9 + 65536, 1)
        );
    }

    // Invariant H7
    #[test]
    fn entries_and_patches_that_break_the_rules_are_refused() {
        let short = |number: u16| number.to_le_bytes().to_vec();
        let patch = |first, words, bytes| [short(first), short(words), vec![1; bytes]].concat();
        let sum = crc32c::crc32c(&[0; PAGE]).to_le_bytes().to_vec();
        let entry = |page, patches: &[u8]| {
            [short(page), short(u16::try_from(patches.len()).unwrap()), sum.clone(), patches.to_vec()]
                .concat()
        };
        let bad_patches = [
            patch(0, 0, 0),
            patch(512, 1, 8),
            patch(511, 2, 16),
            patch(65535, 65535, 8),
            patch(0, 2, 8),
            patch(0, 1, 9),
            vec![0],
            [patch(4, 2, 16), patch(5, 1, 8)].concat(),
            [patch(4, 1, 8), patch(3, 1, 8)].concat(),
        ];
        for patches in bad_patches {
            let payload = entry(0, &patches);
            let entry = entries(&payload).next().unwrap().unwrap();
            let refused = entry.apply(&mut [0; PAGE]).expect_err("not a patch");
            assert!(refused.to_string().ends_with("a page as a difference"), "{refused}: {patches:?}");
        }
        let good = entry(3, &patch(0, 1, 8));
        let bad_entries = [
            vec![0; 7],
            entry(0, &[]),
            entry(0, &[0; PATCHES_BYTES_MAX + 1]),
            good[..good.len() - 1].to_vec(),
            [good.clone(), good.clone()].concat(),
            [good.clone(), entry(2, &patch(0, 1, 8))].concat(),
            [good, vec![9]].concat(),
        ];
        for payload in bad_entries {
            assert!(entries(&payload).any(|entry| entry.is_err()), "{payload:?}");
            assert!(entries(&payload).count() <= 2, "it ends at the first");
        }
    }

    /// A page, and changes of it: (where, how many bytes, what).
    fn changes() -> impl Strategy<Value = Vec<(usize, usize, u8)>> {
        let long = prop_oneof![8 => 1_usize..20, 1 => 0_usize..PAGE];
        proptest::collection::vec((0..PAGE, long, any::<u8>()), 0..24)
    }

    proptest! {
        #[test]
        fn whatever_has_changed_arrives(seed in any::<u64>(), zero in any::<bool>(), changes in changes()) {
            let old = if zero { page_of(vec![0; PAGE]) } else { noise(seed) };
            let mut new = old.clone();
            for (at, long, with) in changes {
                let end = (at + long).min(PAGE);
                new[at..end].fill(with);
            }
            let length = round_trip(&old, &new);
            prop_assert!(length.unwrap_or(0) <= ENTRY_HEADER + PATCHES_BYTES_MAX);
        }

        // Invariant H7
        #[test]
        fn any_bytes_are_entries_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            for entry in entries(&bytes).flatten() {
                let _outcome = entry.apply(&mut [0; PAGE]);
            }
        }

        // Invariant H7
        #[test]
        fn a_good_entry_with_a_changed_byte_leads_to_the_right_page_or_is_refused(
            seed in any::<u64>(), at in any::<prop::sample::Index>(), with in 1_u8.., changes in changes()
        ) {
            let (old, mut new) = (noise(seed), noise(seed));
            for (at, long, with) in changes {
                let end = (at + long).min(PAGE);
                new[at..end].fill(with);
            }
            let mut sent = Entries::default();
            if let Difference::Entry(length) = sent.add(5, &old[..], &new[..]) {
                let mut payload = sent.record().unwrap().2.to_vec();
                payload[at.index(length)] ^= with;
                for entry in entries(&payload).flatten() {
                    let mut page = old.clone();
                    if entry.apply(&mut page).is_ok() {
                        prop_assert!(page == new, "another page was taken");
                    }
                }
            }
        }
    }
}
