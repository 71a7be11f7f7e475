//! A checked reader of GGUF files. Files are hostile until proven otherwise.
//!
//! [`GgufFile::open`] reads header, metadata and tensor directory and checks everything that later code
//! relies on: counts against the bytes that are there, shapes without overflow, types that are known,
//! offsets inside the file. Nothing is allocated in proportion to a number that the file merely claims.
//! Source: the GGUF specification, versions 2 and 3 (ggml, docs/gguf.md).

mod reader;
mod value;

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml};
use memmap2::Mmap;

use crate::InvalidModel;
use reader::Reader;
pub use value::{Strings, Value};

/// Alignment of tensor data when the file names none.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Larger alignments make no sense and would waste the file's space.
const MAX_ALIGNMENT: u64 = 1 << 16;
/// The largest models have a few thousand tensors and a few dozen metadata entries.
const MAX_TENSORS: u64 = 1 << 16;
const MAX_METADATA: u64 = 1 << 12;
/// ggml's own limit of dimensions.
const MAX_DIMENSIONS: u32 = 4;

/// One entry of the tensor directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Sizes, outermost first: a matrix is `[rows, columns]`.
    pub shape: Vec<usize>,
    /// Number format.
    pub dtype: GgmlDType,
    /// First byte in the file.
    offset: usize,
    /// Bytes.
    pub bytes: usize,
}

impl TensorInfo {
    /// How many numbers it holds.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

/// A GGUF file whose structure is sound.
pub struct GgufFile {
    map: Mmap,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl GgufFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// [`InvalidModel`], which names the part of the file, what was found and what is allowed.
    pub fn open(path: &Path) -> Result<Self, InvalidModel> {
        let map = crate::mmap::map(path)?;
        let (metadata, tensors) = read(&map)?;
        Ok(Self {
            map,
            metadata,
            tensors,
        })
    }

    /// Every metadata value.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// The tensor directory.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Size of the file in bytes.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// A metadata value that must be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn value(&self, key: &str) -> Result<&Value, InvalidModel> {
        self.metadata
            .get(key)
            .ok_or_else(|| InvalidModel::missing(format!("metadata {key}")))
    }

    /// A whole number that must be there.
    ///
    /// # Errors
    /// When it is not, or is no such number.
    pub fn u32(&self, key: &str) -> Result<u32, InvalidModel> {
        self.value(key)?.to_u32(key)
    }

    /// A value that may be absent.
    pub(crate) fn optional<'a, T>(
        &'a self,
        key: &str,
        read: impl FnOnce(&'a Value, &str) -> Result<T, InvalidModel>,
    ) -> Result<Option<T>, InvalidModel> {
        self.metadata.get(key).map(|value| read(value, key)).transpose()
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn tensor_bytes(&self, name: &str) -> Result<&[u8], InvalidModel> {
        let info = self.info(name)?;
        self.map
            .get(info.offset..info.offset + info.bytes)
            .ok_or_else(|| InvalidModel::missing(format!("tensor {name}")))
    }

    /// Lets go of the memory behind some bytes of the file: what is looked at again is read again.
    pub fn forget(&self, bytes: &[u8]) {
        crate::mmap::forget(&self.map, bytes);
    }

    /// The directory entry of a tensor that must be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn info(&self, name: &str) -> Result<&TensorInfo, InvalidModel> {
        self.tensors
            .get(name)
            .ok_or_else(|| InvalidModel::missing(format!("tensor {name}")))
    }

    /// A tensor, copied out of the file, which must have this shape.
    ///
    /// # Errors
    /// When it is not there or has another shape.
    pub fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<QTensor, InvalidModel> {
        let info = self.info(name)?;
        if info.shape != shape {
            return Err(InvalidModel::inconsistent(
                format!("shape of tensor {name}"),
                format!("{:?}", info.shape),
                format!("{shape:?}"),
            ));
        }
        let bytes = self.tensor_bytes(name)?;
        let tensor = qtensor_from_ggml(info.dtype, bytes, info.shape.clone(), device);
        self.forget(bytes);
        tensor.map_err(|error| {
            InvalidModel::unsupported(format!("tensor {name}"), error, "the number formats of ggml")
        })
    }
}

type Contents = (BTreeMap<String, Value>, BTreeMap<String, TensorInfo>);

/// Reads and checks the bytes of a file.
fn read(bytes: &[u8]) -> Result<Contents, InvalidModel> {
    let mut reader = Reader::new(bytes);
    let magic = reader.take(4, "the magic")?;
    if magic != b"GGUF" {
        return Err(reader.malformed(
            "the magic",
            format!("{magic:02x?}"),
            "a GGUF file begins with the letters GGUF",
        ));
    }
    let version = reader.u32("the version")?;
    if !matches!(version, 2 | 3) {
        return Err(reader.malformed(
            "the version",
            version,
            "versions 2 and 3 are supported (little-endian)",
        ));
    }
    // A directory entry takes at least 8 + 4 + 8 + 4 + 8 bytes, a metadata entry 8 + 4 + 1.
    let tensor_count = reader.bounded_count("the number of tensors", 32, MAX_TENSORS)?;
    let metadata_count = reader.bounded_count("the number of metadata entries", 13, MAX_METADATA)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let at = reader.offset();
        let key = reader.text("a metadata key", reader::MAX_NAME_BYTES)?;
        let value = reader.value(&key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.malformed_at(
                at,
                format!("metadata key {key:?}"),
                "there twice",
                "each key may stand once",
            ));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => DEFAULT_ALIGNMENT,
        Some(value) => u64::from(value.to_u32("general.alignment")?),
    };
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        return Err(InvalidModel::inconsistent(
            "general.alignment",
            alignment,
            format!("a power of two up to {MAX_ALIGNMENT}"),
        ));
    }
    let mut entries = Vec::new();
    for _ in 0..tensor_count {
        entries.push(tensor_entry(&mut reader)?);
    }
    let data_start = (reader.offset() as u64)
        .checked_next_multiple_of(alignment)
        .unwrap_or(u64::MAX);
    let tensors = place(&reader, entries, data_start, alignment, bytes.len() as u64)?;
    Ok((metadata, tensors))
}

struct Entry {
    at: usize,
    name: String,
    shape: Vec<usize>,
    dtype: GgmlDType,
    offset: u64,
    bytes: u64,
}

fn tensor_entry(reader: &mut Reader<'_>) -> Result<Entry, InvalidModel> {
    let at = reader.offset();
    let name = reader.text("a tensor's name", reader::MAX_NAME_BYTES)?;
    let dimensions = reader.u32("the number of dimensions")?;
    if dimensions == 0 || dimensions > MAX_DIMENSIONS {
        let allowed = format!("from 1 to {MAX_DIMENSIONS}");
        return Err(reader.malformed(
            format!("the number of dimensions of tensor {name}"),
            dimensions,
            allowed,
        ));
    }
    let mut shape = Vec::new();
    let mut elements = 1_u64;
    for _ in 0..dimensions {
        let size = reader.u64("a dimension")?;
        elements = elements
            .checked_mul(size)
            .filter(|&n| n > 0 && n <= i64::MAX as u64)
            .ok_or_else(|| {
                reader.malformed(
                    format!("the shape of tensor {name}"),
                    format!("with a dimension of {size}"),
                    "sizes must be positive and their product must fit 63 bits",
                )
            })?;
        shape.push(size as usize);
    }
    let first = shape.first().copied().unwrap_or(1) as u64;
    shape.reverse();
    let number = reader.u32("a tensor's type")?;
    let dtype = dtype(number).ok_or_else(|| {
        InvalidModel::unsupported(
            format!("the type of tensor {name}"),
            format!("number {number}"),
            "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K",
        )
    })?;
    let block = dtype.block_size() as u64;
    if !first.is_multiple_of(block) {
        return Err(reader.malformed(
            format!("the row length of tensor {name}"),
            first,
            format!("a multiple of {block} for {dtype:?}"),
        ));
    }
    let bytes = (elements / block)
        .checked_mul(dtype.type_size() as u64)
        .ok_or_else(|| {
            reader.malformed(
                format!("the size of tensor {name}"),
                elements,
                "bytes that fit 64 bits",
            )
        })?;
    let offset = reader.u64("a tensor's offset")?;
    Ok(Entry {
        at,
        name,
        shape,
        dtype,
        offset,
        bytes,
    })
}

/// Checks where the tensors lie: aligned, inside the file, none over another.
fn place(
    reader: &Reader<'_>,
    entries: Vec<Entry>,
    data_start: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<BTreeMap<String, TensorInfo>, InvalidModel> {
    let mut spans: Vec<(u64, u64, usize)> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let what = || format!("the data of tensor {}", entry.name);
        if entry.offset % alignment != 0 {
            return Err(reader.malformed_at(
                entry.at,
                what(),
                format!("at offset {}", entry.offset),
                format!("offsets are multiples of {alignment}"),
            ));
        }
        let start = data_start.checked_add(entry.offset);
        let end = start
            .and_then(|start| start.checked_add(entry.bytes))
            .filter(|&end| end <= file_bytes);
        let (Some(start), Some(end)) = (start, end) else {
            let found = format!("{} bytes at offset {} of the data", entry.bytes, entry.offset);
            return Err(reader.malformed_at(
                entry.at,
                what(),
                found,
                format!("the file has {file_bytes} bytes: it is truncated or damaged"),
            ));
        };
        spans.push((start, end, index));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if let [(_, end, first), (start, _, second)] = pair
            && end > start
        {
            let (first, second) = (&entries[*first], &entries[*second]);
            return Err(reader.malformed_at(
                second.at,
                format!("the data of tensor {}", second.name),
                format!("over that of tensor {}", first.name),
                "tensors may not overlap",
            ));
        }
    }
    let mut tensors = BTreeMap::new();
    for entry in entries {
        let info = TensorInfo {
            shape: entry.shape,
            dtype: entry.dtype,
            offset: (data_start + entry.offset) as usize,
            bytes: entry.bytes as usize,
        };
        if tensors.insert(entry.name.clone(), info).is_some() {
            return Err(reader.malformed_at(
                entry.at,
                format!("tensor {:?}", entry.name),
                "there twice",
                "each name may stand once",
            ));
        }
    }
    Ok(tensors)
}

/// ggml's numbers for its types, as far as candle computes with them.
fn dtype(number: u32) -> Option<GgmlDType> {
    Some(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

#[cfg(test)]
pub(crate) mod tests;
