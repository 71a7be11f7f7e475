//! Where weights lie: one after the other, in one mapping of large pages.
//!
//! Decoding reads all weights for every token, in the order in which they were packed. Together they fill
//! pages of 2 MiB, which the matrices of a small model alone do not, and reading ahead across the end of
//! one meets the next.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{MmapOptions, MmapRaw};

/// Where large pages begin.
const PAGE: usize = 2 << 20;
/// Where pieces begin.
const ALIGNMENT: usize = 64;

/// Room for the weights of a model. Given back when the last piece is dropped.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    room: Mutex<Option<Room>>,
}

#[derive(Debug)]
struct Room {
    mapping: Arc<MmapRaw>,
    free: Range<usize>,
}

impl Memory {
    /// Room for so many bytes. What is not taken costs nothing.
    ///
    /// # Errors
    /// When the system maps no memory.
    pub(crate) fn for_bytes(bytes: usize) -> std::io::Result<Self> {
        Ok(Self {
            room: Mutex::new(Some(Room::new(bytes)?)),
        })
    }

    /// A piece of zeros: of the room, or where that is too small in a mapping of its own.
    ///
    /// # Errors
    /// When the system maps no memory.
    pub(crate) fn take(&self, bytes: usize) -> std::io::Result<Piece> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        match room.as_mut().and_then(|room| room.take(bytes)) {
            Some(piece) => Ok(piece),
            None => Room::new(bytes)?
                .take(bytes)
                .ok_or_else(|| std::io::ErrorKind::OutOfMemory.into()),
        }
    }
}

impl Room {
    fn new(bytes: usize) -> std::io::Result<Self> {
        let all = bytes.checked_add(PAGE).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let mapping = MmapOptions::new().len(all).no_reserve_swap().map_anon()?;
        // A kernel without large pages says no, and nothing is lost.
        #[cfg(target_os = "linux")]
        let _ = mapping.advise(memmap2::Advice::HugePage);
        let mapping = MmapRaw::from(mapping);
        let start = mapping.as_ptr().align_offset(PAGE).min(PAGE);
        Ok(Self {
            mapping: Arc::new(mapping),
            free: start..all,
        })
    }

    fn take(&mut self, bytes: usize) -> Option<Piece> {
        let room = bytes.checked_next_multiple_of(ALIGNMENT)?;
        if room > self.free.len() {
            return None;
        }
        let range = self.free.start..self.free.start + bytes;
        self.free.start += room;
        Some(Piece {
            mapping: Arc::clone(&self.mapping),
            range,
        })
    }
}

/// Bytes that nobody else has.
#[derive(Debug)]
pub(crate) struct Piece {
    mapping: Arc<MmapRaw>,
    range: Range<usize>,
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies inside the mapping, which lives as long as the piece; ranges of pieces
        // do not overlap, and anonymous memory holds valid bytes from the start.
        unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().add(self.range.start), self.range.len()) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the piece is borrowed alone.
        unsafe {
            std::slice::from_raw_parts_mut(self.mapping.as_mut_ptr().add(self.range.start), self.range.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_apart_aligned_and_zero() {
        let memory = Memory::for_bytes(1000).unwrap();
        let mut pieces: Vec<Piece> = [100, 1, 700, 64, 5000]
            .into_iter()
            .map(|bytes| memory.take(bytes).unwrap())
            .collect();
        for (index, piece) in pieces.iter_mut().enumerate() {
            assert_eq!(piece.as_ptr().align_offset(ALIGNMENT), 0);
            assert!(piece.iter().all(|&byte| byte == 0));
            piece.fill(index as u8 + 1);
        }
        for (index, piece) in pieces.iter().enumerate() {
            assert!(piece.iter().all(|&byte| usize::from(byte) == index + 1));
        }
        let first = pieces.swap_remove(0);
        drop((pieces, memory));
        assert_eq!(*first, [1; 100]);
    }

    #[test]
    fn what_no_machine_has_is_an_error() {
        assert!(Memory::for_bytes(usize::MAX).is_err());
        assert!(Memory::default().take(usize::MAX - 64).is_err());
        assert!(Memory::default().take(0).unwrap().is_empty());
    }
}
