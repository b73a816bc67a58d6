//! A tour: image ─▶ resumed a few times ─▶ the same image with a fresh working set. `record_image NAME STORE [RECIPE]`

use std::path::Path;
use vmatrix_vma_build::record;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, store, recipe @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: record_image NAME STORE [RECIPE]");
    };
    let recorded = record::record(name, Path::new(store), recipe.first().map(Path::new)).await?;
    println!("{} {:?} was {:?}", recorded.digest, recorded.after, recorded.before);
    Ok(())
}
