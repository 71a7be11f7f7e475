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
