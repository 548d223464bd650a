//! Compiles every kernel family to one fatbin with nvcc and prints the codebooks for the device.
//!
//! | variable | meaning |
//! |---|---|
//! | `HALFBYTE_CUDA` | `1`: nvcc is required; `strict`: and that no kernel spills registers; `0`: CPU only; `auto` (default): CPU only, with a warning, if none is found |
//! | `HALFBYTE_CUDA_ARCHS` | comma-separated targets: `90a` for machine code, `compute_80` for PTX |
//! | `HALFBYTE_NVCC`, `NVCC` | the nvcc to use, before the one of the Python packages, `CUDA_HOME`, `CUDA_PATH` and PATH |

#[path = "build/codebook.rs"]
mod codebook;
#[path = "build/nvcc.rs"]
mod nvcc;

use std::env;
use std::path::{Path, PathBuf};

use nvcc::Nvcc;

const FAMILIES: &[&str] = &[
    "adamw",
    "cross_entropy",
    "dequantize_4bit",
    "dequantize_blockwise",
    "double_quantize",
    "draw",
    "gemm_4bit",
    "gemv_4bit",
    "gemv_4bit_bulk",
    "gemv_4bit_mma",
    "gemv_4bit_shifted",
    "lora_product",
    "low_rank",
    "paged_attention",
    "paged_attention_bulk",
    "paged_attention_mma",
    "quantize_4bit",
    "quantize_blockwise",
    "rms_norm",
    "rope",
    "swiglu",
];

/// One image a generation, and PTX for what comes after them.
const DEFAULT_ARCHS: &str = "75,80,86,89,90a,100,120,compute_80";

const NO_SPILLS: &str = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";

fn main() {
    println!("cargo::rerun-if-changed=build");
    for name in ["HALFBYTE_CUDA", "HALFBYTE_CUDA_ARCHS"].iter().chain(&nvcc::VARIABLES) {
        println!("cargo::rerun-if-env-changed={name}");
    }
    if let Err(message) = build() {
        println!("cargo::error={}", message.replace('\n', "\ncargo::error="));
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    for source in device_sources()? {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    write(&out.join("codebook.cuh"), &codebook::header())?;
    write(&out.join("entry_tables.cuh"), &codebook::entry_tables())?;
    let mode = env::var("HALFBYTE_CUDA").unwrap_or_else(|_| "auto".to_string());
    match mode.as_str() {
        "0" => without_kernels(&out),
        "1" => with_kernels(&out, &nvcc::find()?),
        "strict" => with_kernels(&out, &nvcc::find()?).and_then(|()| refuse_spills(&out)),
        "auto" | "" => match nvcc::find() {
            Ok(nvcc) => with_kernels(&out, &nvcc),
            Err(reason) if nvcc::is_named() => Err(reason),
            Err(reason) => {
                println!("cargo::warning=halfbyte is built WITHOUT CUDA and will run on the CPU only: {reason}");
                without_kernels(&out)
            }
        },
        other => Err(format!("HALFBYTE_CUDA must be 0, 1, strict or auto, got '{other}'")),
    }
}

fn with_kernels(out: &Path, nvcc: &Nvcc) -> Result<(), String> {
    let archs = archs()?;
    nvcc.compile_all(FAMILIES, &archs, out)?;
    println!("cargo::rustc-env=HALFBYTE_BUILT_BY={}", nvcc.version);
    println!("cargo::rustc-env=HALFBYTE_BUILT_FOR={}", archs.join(","));
    Ok(())
}

/// By ptxas' reports of all families and targets.
fn refuse_spills(out: &Path) -> Result<(), String> {
    for family in FAMILIES {
        let report = read(&out.join(format!("{family}.ptxas")))?;
        let mut kernel = "";
        for line in report.lines() {
            if line.contains("Compiling entry function") {
                kernel = line;
            } else if line.contains("bytes stack frame") && line.trim() != NO_SPILLS {
                return Err(format!("{family}: {}\n{kernel}", line.trim()));
            }
        }
    }
    Ok(())
}

fn without_kernels(out: &Path) -> Result<(), String> {
    for family in FAMILIES {
        write(&out.join(format!("{family}.fatbin")), "")?;
        write(&out.join(format!("{family}.ptxas")), "")?;
        write(&out.join(format!("{family}.inputs")), "")?;
    }
    println!("cargo::rustc-env=HALFBYTE_BUILT_BY=");
    println!("cargo::rustc-env=HALFBYTE_BUILT_FOR=");
    Ok(())
}

fn archs() -> Result<Vec<String>, String> {
    let list = env::var("HALFBYTE_CUDA_ARCHS").ok().filter(|list| !list.trim().is_empty());
    let list = list.as_deref().unwrap_or(DEFAULT_ARCHS);
    list.split(',').map(str::trim).map(check_arch).collect()
}

fn check_arch(arch: &str) -> Result<String, String> {
    let number = arch.strip_prefix("compute_").unwrap_or(arch).trim_end_matches(['a', 'f']);
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("HALFBYTE_CUDA_ARCHS takes targets like '90a' or 'compute_80', got '{arch}'"));
    }
    Ok(arch.to_string())
}

/// Every .cu and .cuh file, in a fixed order.
fn device_sources() -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir("src").map_err(|error| format!("src: {error}"))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut sources: Vec<_> =
        paths.filter(|path| path.extension().is_some_and(|end| end == "cu" || end == "cuh")).collect();
    sources.sort();
    Ok(sources)
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
