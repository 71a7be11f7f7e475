#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    freehold_fuzz::targets::gguf(data);
});
