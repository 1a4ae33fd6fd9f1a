package index

import (
	"context"
	"database/sql"
	"fmt"
)

// migrations make each version of the schema from the one before it. Those that were released never
// change: a new version is a new entry. PRAGMA user_version is how many a database has been through.
var migrations = []string{
	// Triggers keep the sums, of tasks and of all, so that no statement can forget to. The default scope is ''.
	`
CREATE TABLE state (
	complete          INTEGER NOT NULL, -- every stored artifact has a row, as far as anybody knows
	clean             INTEGER NOT NULL, -- the process that wrote last ended in good order
	hits              INTEGER NOT NULL,
	misses            INTEGER NOT NULL,
	stored            INTEGER NOT NULL,
	evicted           INTEGER NOT NULL,
	evicted_disk_size INTEGER NOT NULL,
	artifacts         INTEGER NOT NULL,
	size              INTEGER NOT NULL,
	uncompressed_size INTEGER NOT NULL,
	disk_size         INTEGER NOT NULL
);
INSERT INTO state VALUES (0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0);

CREATE TABLE tasks (
	id                INTEGER PRIMARY KEY,
	package           TEXT NOT NULL,
	task              TEXT NOT NULL,
	artifacts         INTEGER NOT NULL DEFAULT 0,
	size              INTEGER NOT NULL DEFAULT 0,
	uncompressed_size INTEGER NOT NULL DEFAULT 0,
	disk_size         INTEGER NOT NULL DEFAULT 0,
	hits              INTEGER NOT NULL DEFAULT 0,
	misses            INTEGER NOT NULL DEFAULT 0,
	stored            INTEGER NOT NULL DEFAULT 0,
	evicted           INTEGER NOT NULL DEFAULT 0,
	evicted_disk_size INTEGER NOT NULL DEFAULT 0,
	UNIQUE (package, task)
);
CREATE INDEX tasks_without_artifacts ON tasks (id) WHERE artifacts = 0;

CREATE TABLE artifacts (
	id                INTEGER PRIMARY KEY,
	scope             TEXT NOT NULL DEFAULT '',
	key               TEXT NOT NULL,
	hash              BLOB,             -- NULL until it is verified
	size              INTEGER NOT NULL,
	uncompressed_size INTEGER NOT NULL,
	files             INTEGER NOT NULL,
	task_id           INTEGER NOT NULL REFERENCES tasks (id),
	command           TEXT NOT NULL,
	created_at        INTEGER NOT NULL, -- Unix seconds
	stored_at         INTEGER NOT NULL, -- Unix nanoseconds
	used_at           INTEGER NOT NULL, -- Unix nanoseconds
	uses              INTEGER NOT NULL,
	disk_size         INTEGER NOT NULL,
	pinned            INTEGER NOT NULL,
	UNIQUE (scope, key)
);
CREATE INDEX artifacts_by_used_at ON artifacts (used_at);
CREATE INDEX artifacts_by_stored_at ON artifacts (stored_at);
CREATE INDEX artifacts_by_size ON artifacts (size);
CREATE INDEX artifacts_by_task ON artifacts (task_id, stored_at);

CREATE TRIGGER artifacts_inserted AFTER INSERT ON artifacts BEGIN
	UPDATE tasks SET artifacts = artifacts + 1, size = size + new.size,
		uncompressed_size = uncompressed_size + new.uncompressed_size, disk_size = disk_size + new.disk_size WHERE id = new.task_id;
	UPDATE state SET artifacts = artifacts + 1, size = size + new.size,
		uncompressed_size = uncompressed_size + new.uncompressed_size, disk_size = disk_size + new.disk_size;
END;
CREATE TRIGGER artifacts_deleted AFTER DELETE ON artifacts BEGIN
	UPDATE tasks SET artifacts = artifacts - 1, size = size - old.size,
		uncompressed_size = uncompressed_size - old.uncompressed_size, disk_size = disk_size - old.disk_size WHERE id = old.task_id;
	UPDATE state SET artifacts = artifacts - 1, size = size - old.size,
		uncompressed_size = uncompressed_size - old.uncompressed_size, disk_size = disk_size - old.disk_size;
END;
CREATE TRIGGER artifacts_updated AFTER UPDATE OF task_id, size, uncompressed_size, disk_size ON artifacts BEGIN
	UPDATE tasks SET artifacts = artifacts - 1, size = size - old.size,
		uncompressed_size = uncompressed_size - old.uncompressed_size, disk_size = disk_size - old.disk_size WHERE id = old.task_id;
	UPDATE state SET artifacts = artifacts - 1, size = size - old.size,
		uncompressed_size = uncompressed_size - old.uncompressed_size, disk_size = disk_size - old.disk_size;
	UPDATE tasks SET artifacts = artifacts + 1, size = size + new.size,
		uncompressed_size = uncompressed_size + new.uncompressed_size, disk_size = disk_size + new.disk_size WHERE id = new.task_id;
	UPDATE state SET artifacts = artifacts + 1, size = size + new.size,
		uncompressed_size = uncompressed_size + new.uncompressed_size, disk_size = disk_size + new.disk_size;
END;
`,
	// The sums of scopes, too. Of the default one, where most artifacts are, they are what is left of all.
	`
CREATE TABLE scopes (
	name      TEXT PRIMARY KEY,
	artifacts INTEGER NOT NULL,
	size      INTEGER NOT NULL,
	disk_size INTEGER NOT NULL
) WITHOUT ROWID;

CREATE TRIGGER scoped_inserted AFTER INSERT ON artifacts WHEN new.scope <> '' BEGIN
	INSERT INTO scopes VALUES (new.scope, 1, new.size, new.disk_size)
		ON CONFLICT (name) DO UPDATE SET artifacts = artifacts + 1, size = size + excluded.size, disk_size = disk_size + excluded.disk_size;
END;
CREATE TRIGGER scoped_deleted AFTER DELETE ON artifacts WHEN old.scope <> '' BEGIN
	UPDATE scopes SET artifacts = artifacts - 1, size = size - old.size, disk_size = disk_size - old.disk_size WHERE name = old.scope;
	DELETE FROM scopes WHERE name = old.scope AND artifacts = 0;
END;
CREATE TRIGGER scoped_updated AFTER UPDATE OF size, disk_size ON artifacts WHEN new.scope <> '' BEGIN
	UPDATE scopes SET size = size - old.size + new.size, disk_size = disk_size - old.disk_size + new.disk_size WHERE name = new.scope;
END;
`,
	// What was found by comparing artifacts of one key in two scopes.
	`
ALTER TABLE state ADD COLUMN agreed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE state ADD COLUMN differed INTEGER NOT NULL DEFAULT 0;
`,
	// The sums of tasks in scopes, for those who may not see all of these. Of the default one, again, they are what is
	// left of all.
	`
CREATE TABLE scope_tasks (
	scope             TEXT NOT NULL,
	task_id           INTEGER NOT NULL,
	artifacts         INTEGER NOT NULL,
	size              INTEGER NOT NULL,
	uncompressed_size INTEGER NOT NULL,
	disk_size         INTEGER NOT NULL,
	PRIMARY KEY (scope, task_id)
) WITHOUT ROWID;
INSERT INTO scope_tasks SELECT scope, task_id, count(*), sum(size), sum(uncompressed_size), sum(disk_size)
	FROM artifacts WHERE scope > '' GROUP BY scope, task_id;

CREATE TRIGGER scope_task_inserted AFTER INSERT ON artifacts WHEN new.scope <> '' BEGIN
	INSERT INTO scope_tasks VALUES (new.scope, new.task_id, 1, new.size, new.uncompressed_size, new.disk_size)
		ON CONFLICT (scope, task_id) DO UPDATE SET artifacts = artifacts + 1, size = size + excluded.size,
			uncompressed_size = uncompressed_size + excluded.uncompressed_size, disk_size = disk_size + excluded.disk_size;
END;
CREATE TRIGGER scope_task_deleted AFTER DELETE ON artifacts WHEN old.scope <> '' BEGIN
	UPDATE scope_tasks SET artifacts = artifacts - 1, size = size - old.size, uncompressed_size = uncompressed_size - old.uncompressed_size,
		disk_size = disk_size - old.disk_size WHERE scope = old.scope AND task_id = old.task_id;
	DELETE FROM scope_tasks WHERE scope = old.scope AND task_id = old.task_id AND artifacts = 0;
END;
CREATE TRIGGER scope_task_updated AFTER UPDATE OF task_id, size, uncompressed_size, disk_size ON artifacts WHEN new.scope <> '' BEGIN
	INSERT INTO scope_tasks VALUES (new.scope, new.task_id, 1, new.size, new.uncompressed_size, new.disk_size)
		ON CONFLICT (scope, task_id) DO UPDATE SET artifacts = artifacts + 1, size = size + excluded.size,
			uncompressed_size = uncompressed_size + excluded.uncompressed_size, disk_size = disk_size + excluded.disk_size;
	UPDATE scope_tasks SET artifacts = artifacts - 1, size = size - old.size, uncompressed_size = uncompressed_size - old.uncompressed_size,
		disk_size = disk_size - old.disk_size WHERE scope = old.scope AND task_id = old.task_id;
	DELETE FROM scope_tasks WHERE scope = old.scope AND task_id = old.task_id AND artifacts = 0;
END;
`,
}

// migrate brings a database to the newest version of the schema.
func migrate(ctx context.Context, db *sql.DB) error {
	var version int
	if err := db.QueryRowContext(ctx, "PRAGMA user_version").Scan(&version); err != nil {
		return err
	}
	if version > len(migrations) {
		return fmt.Errorf("%w: its schema has version %d, and this polykit-cache knows %d", ErrNewer, version, len(migrations))
	}
	for ; version < len(migrations); version++ {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, migrations[version])
		if err == nil { // which takes no parameters
			_, err = tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d", version+1))
		}
		if err != nil {
			tx.Rollback()
			return fmt.Errorf("migrate the index to version %d: %w", version+1, err)
		}
		if err := tx.Commit(); err != nil {
			return err
		}
	}
	return nil
}
