//! The one place where a file is mapped into memory.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use crate::InvalidModel;

/// Maps a file for reading.
#[allow(unsafe_code)]
pub(crate) fn map(path: &Path) -> Result<Mmap, InvalidModel> {
    let open = |source| InvalidModel::OpenFile {
        path: path.to_owned(),
        source,
    };
    // Looked at before it is opened: opening a named pipe would wait for its writer for ever.
    let kind = std::fs::metadata(path).map_err(open)?;
    if !kind.is_file() {
        let source = std::io::Error::other("not a regular file");
        return Err(open(source));
    }
    let file = File::open(path).map_err(open)?;
    // SAFETY: the mapping is read-only and private. The store's files are never written after they have
    // their name; a `path` source that its owner truncates while it is being loaded raises SIGBUS, which
    // ends this worker process and nothing else.
    unsafe { Mmap::map(&file) }.map_err(open)
}

/// What Linux maps at once at most where it keeps a file in large pieces (since 6.16 ext4's too): a page that is touched
/// brings all of its piece. Pieces are aligned to their size in the file.
const LARGEST_PIECE: usize = 2 << 20;

/// Lets go of the memory behind a part of a mapping, and behind what came with it. Bytes of something else are left
/// alone.
#[allow(unsafe_code)]
pub(crate) fn forget(map: &Mmap, part: &[u8]) {
    let Some(offset) = (part.as_ptr() as usize).checked_sub(map.as_ptr() as usize) else {
        return;
    };
    if part.is_empty() || offset + part.len() > map.len() {
        return;
    }
    // SAFETY: the mapping is of a file, for reading only: a page that is let go is filled with the same bytes of
    // the file when it is touched again. A system that does not know this advice keeps the pages, which is no harm.
    #[cfg(unix)]
    let _ = unsafe {
        let start = offset / LARGEST_PIECE * LARGEST_PIECE;
        let end = (offset + part.len())
            .next_multiple_of(LARGEST_PIECE)
            .min(map.len());
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_let_go_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..1 << 20).map(|i| (i / 7) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let map = map(&path).unwrap();
        for range in [0..bytes.len(), 5000..700_000, 3..4, 9..9] {
            forget(&map, &map[range]);
            assert_eq!(&map[..], &bytes[..]);
        }
        let other = vec![1_u8; 8192];
        forget(&map, &other);
        assert!(other.iter().all(|&byte| byte == 1));
    }
}
